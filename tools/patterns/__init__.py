"""Every bit pattern through small masters and rounding: ``python -m tools.patterns``.

``subjects`` lists what goes through what, ``checks`` what has to hold, ``device`` has the device
functions under the signatures of their twins.
"""
