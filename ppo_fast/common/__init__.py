"""Parts that trainers and commands share: errors, options, devices, files, signals, the terminal. No PPO."""
