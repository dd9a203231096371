"""On the path of the commands that tests start: the package does without torch, which only tests and `launch/verify.py` have.

Without this, transformers would import it wherever it is installed, which takes seconds a command.
"""

import sys

sys.modules |= dict.fromkeys(("torch", "torchvision"))
