"""Set an environment variable before torch is imported, when its threads read it."""

import os

# OpenMP threads that wait for each other soon sleep instead of spinning. This cost nothing
# measurable; on a busy machine, spinning made a training step several times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
