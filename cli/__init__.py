"""The ``quantkit`` command: a thin layer that parses, makes one library call and renders the result.

    app.py       the commands: help, one library call each
    options.py   the options that several commands share
    run.py       what every command shares: errors to messages and exit codes, JSON
    signals.py   Ctrl-C and SIGTERM
    progress.py  the live display of a conversion, or plain lines where there is no terminal
    tables.py    results as rich tables
    coverage.py  what calibration saw, as tables and a heat map
    evaluation.py, evaluation_tables.py, evaluation_progress.py  the commands eval and compare, their tables and their display
    data.py      results as JSON-able dictionaries
    presets.py   the presets, each with a line for people who choose
    text.py      sizes, durations and counts as text, and back

The folder is installed as ``quantkit_cli``.  The library, and with it torch, is imported inside the commands only, so that
``quantkit --help`` and shell completion answer at once.
"""
