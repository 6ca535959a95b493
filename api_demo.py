"""The shortest client of the service: Python's standard library alone, an answer as it is written.

    python api_demo.py
    python api_demo.py "What is 17 plus 25?" http://localhost:8000
"""

import json
import sys
import urllib.request

question = sys.argv[1] if len(sys.argv) > 1 else "法国的首都是哪里？"
url = sys.argv[2] if len(sys.argv) > 2 else "http://localhost:8000"
body = json.dumps({"messages": [{"role": "user", "content": question}], "stream": True}).encode()
request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
try:
    with urllib.request.urlopen(request) as reply:
        for line in reply:
            if line.startswith(b"data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    print(choice["delta"].get("content") or "", end="", flush=True)
except OSError as error:
    print(f"error: {url} gives no answer ({error}); start the service, or give its address", file=sys.stderr)
    sys.exit(2)
print()
