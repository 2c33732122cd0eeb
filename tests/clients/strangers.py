"""Opens files of strangers; python strangers.py FILE [FILE ...] prints a line of JSON per file."""

import json
import sys

from dynamics_model import load_ensemble

for path in sys.argv[1:]:
    try:
        load_ensemble(path)
    except Exception as error:
        print(json.dumps([type(error).__name__, str(error)]))
    else:
        print(json.dumps(["loaded", path]))
