"""Print what pyproject.toml requires, without the package: python list_requirements.py [EXTRA ...]. An image installs this first."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
print(*project["dependencies"], *(name for extra in sys.argv[1:] for name in project["optional-dependencies"][extra]), sep="\n")
