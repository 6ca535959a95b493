"""From raw text to records, and what a tokenizer needs to know besides its vocabulary.

In order: text_files (documents and records, from files and folders), download (public sets), account (what of records
was left out or cut), cleaning (a folder: dirty text → clean text), turns (fields and turns of published records →
messages), conversation_data (all shapes of records → one), chat_template (messages → the text of a prompt),
tokenizer_files (tokenizer folders, ours and published ones), fast_encoding (text → ids by the fastest engine),
bpe_training (text → merges), tokenizer_report (how well a tokenizer fits a text), token_shards (tokenized text on the
disk). For users: inspect (what a data file will be to a model).
"""
