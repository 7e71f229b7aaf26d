"""The ``quantkit`` command: a thin layer that parses, makes one library call and renders the result.

    app.py       the small commands, and where the others are registered with their examples
    convert.py, calibrate.py, plan.py, repack.py, evaluation.py (eval and compare)  the others, one library call each
    options.py, evaluation_options.py  the options that several commands share
    run.py       what every command shares: errors to messages and exit codes, JSON
    signals.py   Ctrl-C and SIGTERM
    display.py   progress: live lines, or plain ones where there is no terminal
    progress.py, evaluation_progress.py  what these lines say of a conversion and of an evaluation
    tables.py, evaluation_tables.py  results as rich tables
    coverage.py  what calibration saw, as tables and a heat map
    data.py      results as JSON-able dictionaries
    presets.py   the presets, each with a line for people who choose
    text.py      sizes, durations and counts as text, and back

The folder is installed as ``quantkit_cli``.  The library, and with it torch, is imported inside the commands only, so that
``quantkit --help`` and shell completion answer at once.
"""
