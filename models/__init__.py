"""Make `import models` give the package `l2ul.models`, as in the paper's repository.

The architectures are in `l2ul/models`, so that an installed L2UL does not occupy the top-level name `models`.
"""

import sys

from l2ul import models

sys.modules[__name__] = models
for name in [name for name in sys.modules if name.startswith("l2ul.models.")]:
    sys.modules[name.removeprefix("l2ul.")] = sys.modules[name]
