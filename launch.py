"""Train a recipe: accelerate launch launch.py recipe=vit optim.lr=1e-4 (or python, torchrun or srun in front of this file)."""

import os
import sys

from galaxydist.cli.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
