"""Run the shape comments: `x = f(y)  # (B, C, 2*h, 2*w)` is checked while code runs.

Within one call of one function a symbol stands for one size. Integer locals of the
same name (B, C, h, w = x.shape) define it; otherwise the first comment that uses the
bare symbol does. A comment that disagrees, or that no call ever reached, is an error.
"""
import ast
import io
import re
import sys
import tokenize
from contextlib import contextmanager
from pathlib import Path

COMMENT = re.compile(r"#\s*\(([\w\s,*+/-]+)\)")


def shape_comments(path: Path) -> dict[int, tuple[str, list[str], int]]:
    """{first line of an assignment: (variable, symbols, line of the comment)}"""
    source = path.read_text()
    comments = {token.start[0]: token.string
                for token in tokenize.generate_tokens(io.StringIO(source).readline)
                if token.type == tokenize.COMMENT}
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            match = COMMENT.match(comments.get(node.end_lineno, ""))
            if match:
                symbols = [s.strip() for s in match[1].split(",") if s.strip()]
                found[node.lineno] = node.targets[0].id, symbols, node.end_lineno
    return found


class Call:
    """One running function: what its symbols mean, and which line ran last."""

    def __init__(self):
        self.sizes, self.previous, self.waiting = {}, None, []


def disagreement(symbols, shape, sizes) -> str | None:
    """None if shape and comment agree; NameError if a symbol has no size yet."""
    if len(symbols) != len(shape):
        return f"{len(symbols)} dimensions in the comment, {len(shape)} in the tensor"
    for symbol, size in zip(symbols, shape):
        if symbol.isidentifier():
            sizes.setdefault(symbol, size)
    for symbol, size in zip(symbols, shape):
        value = eval(symbol, {"__builtins__": {}}, sizes)  # only names, + - * /, digits
        if value != size:
            return f"{symbol} is {value}, the tensor has {size}"
    return None


@contextmanager
def checked(path: Path, errors: list[str]):
    """Trace every call into `path`; complaints are appended to `errors`."""
    comments, reached = shape_comments(path), set()

    def check(call, name, symbols, shape, line) -> None:
        try:
            wrong = disagreement(symbols, shape, call.sizes)
        except NameError:
            return call.waiting.append((name, symbols, shape, line))
        reached.add(line)
        if wrong:
            errors.append(f"{path.name}:{line}: {name} is {tuple(shape)}, comment says "
                          f"({', '.join(symbols)}): {wrong}")

    def trace_lines(call):
        def local(frame, event, _):
            call.sizes.update({k: v for k, v in frame.f_locals.items()
                               if isinstance(v, int) and not isinstance(v, bool)
                               and k not in call.sizes})
            if call.previous in comments:
                name, symbols, line = comments[call.previous]
                value = frame.f_locals.get(name)
                if hasattr(value, "shape"):
                    check(call, name, symbols, tuple(value.shape), line)
            if event == "return":
                waiting, call.waiting = call.waiting, []
                for item in waiting:
                    check(call, *item)
            call.previous = frame.f_lineno
            return local
        return local

    def trace(frame, event, _):
        if event == "call" and frame.f_code.co_filename == str(path):
            return trace_lines(Call())

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
    never = {line for _, _, line in comments.values()} - reached
    errors += [f"{path.name}:{line}: this shape comment was never reached" for line in
               sorted(never)]
