"""Many runs that answer one question: trained where, scored on which cases, and compared."""
