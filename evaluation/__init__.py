"""How good models and their answers are, and how that is reported.

In order: intervals (how certain a figure is), text_metrics (BLEU, ROUGE, chrF, numbers, repetition), kept_work (what an
interrupted evaluation has done), score_page (one evaluation as a page), text_report (text scored token by token);
answer_checker (a program decides: right, whole, polite?), answer_report (answers beside their references, by skill),
multiple_choice (C-Eval, CMMLU, MMLU, ARC), side_by_side (two models and a judge), ngram_baseline (the same questions
for an n-gram model), lm_eval_task (the same questions for lm-evaluation-harness), report (the page that sums up all
stages).
"""
