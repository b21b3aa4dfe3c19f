"""FedFMS Kit: hospitals fine-tune Segment Anything (SAM) together without moving an image."""

__version__ = "0.1.0"
