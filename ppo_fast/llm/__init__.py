"""PPO for language models: the trainer, its models, its packed rollouts and its reports."""
