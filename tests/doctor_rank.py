"""A rank of the doctor's examination, started by torchrun: ``doctor_rank.py FOLDER``."""

import os
import sys
from pathlib import Path

from galaxydist.cluster.doctor.rank import Examination, examine

examine(Examination(Path(sys.argv[1]), data_dir=Path(sys.argv[1]), scratch=Path(sys.argv[1]), gpus_per_node=0), os.environ)
