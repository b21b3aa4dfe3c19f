"""What `make bench` measures, a file a section; benchmarks/paired.py says what is in one."""
