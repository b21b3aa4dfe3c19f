"""What a job leaves behind: its records, the tables made of them, and the names of its files."""
