"""FedFMS Kit: hospitals fine-tune Segment Anything (SAM) together without moving an image."""

import os

__version__ = "0.1.0"

# unless this stands before its import, onnxruntime from 1.29 on reports to Microsoft what it runs
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
