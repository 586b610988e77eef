"""The shortcut test: does a network, anybody's, look at the background? (extras [lab,explain]; docs/diagnose.md)

found = diagnose(model, data)         # data: (image, label, mask); S-IB plays no part
found.verdict.headline; found.save("diagnosis")
"""

from sib_fast.lab.shortcut.run import Diagnosis, diagnose
from sib_fast.lab.shortcut.subject import Subject, open_network

__all__ = ["Diagnosis", "Subject", "diagnose", "open_network"]
