"""DICOM in: series as volumes, and segmentations and structure sets as label values on them."""
