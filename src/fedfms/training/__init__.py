"""Network and cases to a change and its scores. Knows nothing of NVFLARE or paths."""
