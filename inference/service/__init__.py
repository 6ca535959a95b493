"""The HTTP surface of inference/api_service.py, part by part. In this order they can be read:

settings        options and environment variables; which model is served, and why
errors          the one shape of errors
requests        what clients may ask
folding         what a text says, however it is written
filters         forbidden phrases in questions and answers
text_classifier a further filter: one of our own models
rate_limit      how often each caller may ask
bodies          from bytes to a checked request, at a bounded cost
structured      answers of a given form
conversations   messages and tools → prompt; answers → calls
model_server    loading, asking and exchanging the model
answers         whole answers and streamed ones
openai_api      the routes under /v1
workers         several processes behind one port
metrics         /metrics
documentation   /docs and /openapi.json
static_page     the chat page, whose files are in page/
logs            lines that cannot be forged
gate            keys, rates, request ids, failures
door            newcomers, and what they are told when the line is full
connections     connections with bounds; the server
"""
