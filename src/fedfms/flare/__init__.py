"""The only folder that imports NVFLARE. No maths, no training, no images."""

import os

# A process with an open gRPC connection that starts a program forks first, and gRPC's handlers for
# that may abort the child before it is the program. We start programs and never go on in a fork.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
