"""`helm test`: one picture or video by REST. The environment has server, model, fields and key; an
error ends it."""

import base64
import json
import os
import urllib.request

is_video = os.environ["SPRAY_MAKES"] == "video"
body = {"model": os.environ["SPRAY_MODEL"], "prompt": "a cup of coffee", "seed": 7}
body |= json.loads(os.environ["SPRAY_FIELDS"])
headers = {"content-type": "application/json"}
if key := os.environ.get("SPRAY_API_KEY"):
    headers["authorization"] = f"Bearer {key}"
path = "/v1/videos/sync" if is_video else "/v1/images/generations"
request = urllib.request.Request(f"http://{os.environ['SPRAY_HTTP']}{path}", json.dumps(body).encode(), headers)
with urllib.request.urlopen(request, timeout=float(os.environ["SPRAY_TIMEOUT"])) as answer:
    made = answer.read()
if is_video:
    assert made[4:8] == b"ftyp", made[:16]
    print(f"an MP4 of {len(made)} bytes by REST")
else:
    picture = base64.b64decode(json.loads(made)["data"][0]["b64_json"])
    assert picture.startswith(b"\x89PNG"), picture[:16]
    print(f"a PNG of {len(picture)} bytes by REST")
