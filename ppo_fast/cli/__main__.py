"""`python -m ppo_fast.cli`, where the script `ppo-fast` is not on the path."""

import sys

from ppo_fast.cli.commands import main

sys.exit(main())
