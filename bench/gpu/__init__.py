"""Everything that a machine with a GPU can say about this checkout, in one command.

``python -m bench.gpu --out DIR`` needs a Python with torch, Triton, pytest and rich, and neither a
network nor an installation. Its files are few and small, so that they can be sent:

    summary.json, summary.md    each stage with its result, time and key figures
    log.txt                     what every command printed, under headings
    junit.xml                   the tests
    DEVICE-COMMIT.json, .png    what ``python -m fusedopt bench`` writes
"""
