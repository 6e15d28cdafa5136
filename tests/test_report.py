"""What the terminal is given to print."""

from minalm.run.console import console, show_samples


def test_samples_hold_nothing_that_a_terminal_obeys():
    with console.capture() as shown:
        show_samples([("def f():\n", "\treturn '\x1b[2Jé[/x]'\x00")])
    text = shown.get()
    assert "\x1b[2J" not in text and "\x00" not in text
    assert "def f():\n" in text and "'\ufffd[2Jé[/x]'\ufffd" in text
