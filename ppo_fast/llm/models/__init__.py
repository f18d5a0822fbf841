"""Models of transformers in PPO: loading, heads, actor and critic, reference, LoRA."""
