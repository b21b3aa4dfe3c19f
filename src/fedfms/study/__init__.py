"""Many runs that answer one question: what was trained where, scored on which cases, and compared."""
