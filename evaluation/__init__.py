"""How good the answers are, whoever wrote them, and what is told of it.

In order: answer_checker (a program decides: right, whole, polite?), answer_report (BLEU, ROUGE and exactness, by
skill), ngram_baseline (the same questions for an n-gram model), report (the page that sums up the whole way).
"""
