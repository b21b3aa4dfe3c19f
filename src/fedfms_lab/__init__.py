"""The laboratory: studies and public data sets. It is not in a hospital's image."""

import fedfms

__version__ = "0.1.0"  # that of fedfms: both come from one repository

if fedfms.__version__ != __version__:
    raise ImportError(
        f"fedfms-lab {__version__} is installed beside fedfms {fedfms.__version__}; "
        "install both from one checkout: pip install . ./src/fedfms_lab"
    )
