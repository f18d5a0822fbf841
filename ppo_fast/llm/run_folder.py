"""The folder of a run, OUT: its checkpoints, what earlier runs left in it, and saved models."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ppo_fast.common import checkpoint
from ppo_fast.common.errors import InvariantError, NonFiniteError, UserError
from ppo_fast.common.folders import claim
from ppo_fast.llm.config import PPOConfig
from ppo_fast.llm.distributed import Distributed, peer_failure
from ppo_fast.llm.models.critic import Critic
from ppo_fast.llm.models.critic_origin import ORIGIN, origin_text
from ppo_fast.llm.models.head import LanguageModel
from ppo_fast.llm.models.reference import is_adapted
from ppo_fast.llm.report.evaluation import drop_best_after
from ppo_fast.llm.report.export import save_critic, save_model, saved_dtype, saved_hash
from ppo_fast.llm.rollout_files import drop_rollouts_after
from ppo_fast.llm.sharding import full_state_dict

COMMON_ERRORS = (InvariantError, NonFiniteError)  # which all processes raise at the same point, or none

Captured = tuple[Mapping[str, Mapping[str, Tensor]], dict[str, object]]  # tensors by file, and state.json


class RunFolder:
    """OUT of a run; without an OUT nothing is written.

    Args:
        config: `out`, and how many checkpoints are kept.
        distributed: the processes of the run; only the main one writes.
    """

    def __init__(self, config: PPOConfig, distributed: Distributed) -> None:
        self.config, self.distributed = config, distributed
        self.path = None if config.out is None else Path(config.out)
        self.is_claimed = False  # whether OUT was found to be a folder of this project

    def checkpoint_of(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return (self.path or Path()) / "checkpoints" / f"step-{step}"

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint that the main process finds; collective."""
        newest = None if self.path is None else checkpoint.newest(self.path / "checkpoints")
        return self.distributed.all_gather_object(newest)[0]

    def named_newest(self) -> str:
        """The end of a sentence that names the newest checkpoint, which is whole; "" without an OUT."""
        if self.path is None:
            return ""
        newest = checkpoint.newest(self.path / "checkpoints")
        return f"; the newest checkpoint is {newest}" if newest is not None else "; there is no checkpoint yet"

    def clean_up(self, step: int) -> None:
        """Remove what an earlier run left in OUT after `step`, or a killed one left incomplete."""
        if self.path is None:
            return
        out, checkpoints = self.path, self.path / "checkpoints"
        checkpoint.check_folders(out)
        with checkpoint.reported(f"cannot remove what an earlier run left in {out}", out):
            for name in ("best", "best/critic", "model", "critic"):
                checkpoint.recover(out / name)
            checkpoint.remove_partial(checkpoints)
            checkpoint.drop_after(checkpoints, step)
            drop_rollouts_after(out / "rollouts", step)
        checkpoint.prune(checkpoints, self.config.keep_checkpoints)
        drop_best_after(out / "best", step)

    def write_checkpoint(self, step: int, capture: Callable[[], Captured]) -> Path:
        """Write OUT/checkpoints/step-N, if there is none yet, and return its path; collective.

        Args:
            step: N; nothing is written for 0.
            capture: returns what is written, in the main process; collective, too.
        """
        folder = self.checkpoint_of(step)
        written = self.distributed.any_rank(folder.exists())
        if self.path is not None and step > 0 and not written:
            tensors, state = capture()
            if self.distributed.is_main:
                checkpoint.write(folder.parent, step, tensors, state, keep=self.config.keep_checkpoints)
            self.distributed.barrier()
        return folder

    def save_model(
        self,
        name: str,
        actor: LanguageModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: dict[str, str] | None,
        history: Sequence[Mapping[str, float | None]],
    ) -> Path | None:
        """Write actor and tokenizer to OUT/name; collective.

        Args:
            name: of the folder; a model there is replaced.
            actor: the model.
            tokenizer: its tokenizer.
            texts: files to add, by name.
            history: metrics to draw beside them.
        """
        if self.path is None:
            return None
        folder = self.path / name
        if not self.is_claimed:
            self.distributed.run_on_main(lambda: claim(folder.parent))
        weights = full_state_dict(actor) if self.distributed.strategy == "fsdp" else None
        if self.distributed.is_main:
            save_model(
                actor,
                tokenizer,
                folder,
                merge_adapters=self.config.merge_adapters,
                weights=weights,
                texts=texts,
                history=history,
                dtype=saved_dtype(actor, self.config),
            )
        self.distributed.barrier()
        return folder

    def save_critic(
        self, name: str, critic: Critic, actor: LanguageModel, tokenizer: PreTrainedTokenizerBase, start_model: str
    ) -> None:
        """Write the critic to OUT/name; collective. Not under FSDP2 with adapters, which merging needs whole.

        Args:
            name: of the folder; a critic there is replaced.
            critic: the critic.
            actor: the trained model, as the folder that the critic belongs to has it.
            tokenizer: its tokenizer.
            start_model: hash of the weights with which the run started.
        """
        if self.path is None:
            return
        sharded = self.distributed.strategy == "fsdp"
        if sharded and critic.backbone is not None and is_adapted(critic.backbone):
            if self.distributed.is_main:
                shutil.rmtree(self.path / name, ignore_errors=True)  # of an earlier run
            return
        weights = full_state_dict(critic) if sharded else None
        if self.distributed.is_main:
            saved = None if sharded else saved_hash(actor, self.config)
            models = [] if saved is None else [start_model, saved]  # none: it may be used with any
            texts = {ORIGIN: origin_text(tokenizer, models)}
            save_critic(critic, tokenizer, self.path / name, weights=weights, texts=texts)
        self.distributed.barrier()

    @contextmanager
    def errors_name_checkpoints(self) -> Iterator[None]:
        """Of several processes, one whose error the others do not share cannot save: its message names what is saved.

        Where a collective operation failed, the message also names the processes that it waited for.
        """
        try:
            yield
        except UserError as error:
            if self.distributed.size > 1 and not isinstance(error, COMMON_ERRORS):
                error.args = (f"{error}{self.named_newest()}",)
            raise
        except RuntimeError as error:
            reason = peer_failure(error)
            if not reason:
                raise
            raise UserError(f"{reason}{self.named_newest()}") from error
