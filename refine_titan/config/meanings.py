"""What settings mean, as the docstrings below their fields say."""

import ast
import inspect
import textwrap


def meanings(section: type) -> dict[str, str]:
    """The docstrings of the settings that a section's class declares itself."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0].body
    return {
        field.target.id: " ".join(ast.literal_eval(docstring.value).split())
        for field, docstring in zip(body, body[1:])
        if isinstance(field, ast.AnnAssign) and isinstance(docstring, ast.Expr)
    }
