"""What travels between a site and the server. Knows nothing of NVFLARE or images."""
