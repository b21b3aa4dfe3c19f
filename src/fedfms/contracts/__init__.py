"""Every word that crosses a process, a wire or a disk."""
