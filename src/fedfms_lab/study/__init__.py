"""Many runs that answer one question: what was trained where, and how it scores where."""
