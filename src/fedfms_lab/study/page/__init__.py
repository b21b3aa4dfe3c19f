"""The answer of a study as a reader sees it: a page, Markdown, LaTeX."""
