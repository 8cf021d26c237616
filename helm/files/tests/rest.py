"""`helm test`: one picture by REST. Server, model, fields and key come from the environment; an error ends it."""

import base64
import json
import os
import urllib.request

body = {"model": os.environ["SPRAY_MODEL"], "prompt": "a cup of coffee", "seed": 7}
body |= json.loads(os.environ["SPRAY_FIELDS"])
headers = {"content-type": "application/json"}
if key := os.environ.get("SPRAY_API_KEY"):
    headers["authorization"] = f"Bearer {key}"
url = f"http://{os.environ['SPRAY_HTTP']}/v1/images/generations"
request = urllib.request.Request(url, json.dumps(body).encode(), headers)
with urllib.request.urlopen(request, timeout=float(os.environ["SPRAY_TIMEOUT"])) as answer:
    picture = base64.b64decode(json.load(answer)["data"][0]["b64_json"])
assert picture.startswith(b"\x89PNG"), picture[:16]
print(f"a PNG of {len(picture)} bytes by REST")
