"""How good the answers are, whoever wrote them, and how that is reported.

In order: answer_checker (a program decides: right, whole, polite?), answer_report (BLEU, ROUGE and exactness, by
skill), translation_scores (sacreBLEU), ngram_baseline (the same questions for an n-gram model), lm_eval_task (the same
questions for lm-evaluation-harness), report (the page that sums up all stages).
"""
