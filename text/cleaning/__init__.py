"""Dirty text in, clean text out: `python -m text.cleaning --input raw/ --output clean.jsonl.gz --report report.html`.

In order: repair (one document: broken Unicode, markup, lines that belong to the page and not to the text; the list of
those is patterns.txt), personal_data (what is masked), measure (numbers about many documents at once), rules (which
numbers a document may have; those of Gopher and C4 bear their names), contamination (test sets), duplicates (equal and
similar documents, found on the disk), cleaner (all of it for one document after another), pipeline (files → parts →
output: resumable, with all cores), report (what went and why), __main__ (the command), datatrove_steps (the same on
many machines).
"""
