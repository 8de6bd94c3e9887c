"""Print what pyproject.toml and some extras require: python list_requirements.py [EXTRA ...]. An image installs it first."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
required = [*project["dependencies"], *(name for extra in sys.argv[1:] for name in project["optional-dependencies"][extra])]
sys.stdout.write("".join(f"{name}\n" for name in required))
