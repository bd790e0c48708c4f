"""What is run beside the path of reading: python -m tools.NAME."""


def markdown(rows, header, left=1):
    """A Markdown table. The first `left` columns are aligned left, the others right."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (header, rule, *rows)]
    return "\n".join(lines)
