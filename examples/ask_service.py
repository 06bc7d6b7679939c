"""Ask a service with the `openai` client.

Start the service first:

gap-runtime serve BUNDLE
python examples/ask_service.py photo.png "the red mug"
"""

import argparse
import base64
import mimetypes
from pathlib import Path

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("picture", type=Path)
    parser.add_argument("phrase")
    parser.add_argument("--url", default="http://127.0.0.1:8765")
    parser.add_argument("--token", default="none", help="where the service wants one")
    options = parser.parse_args()

    kind = mimetypes.guess_type(options.picture.name)[0] or "image/png"
    data = base64.b64encode(options.picture.read_bytes()).decode()
    client = OpenAI(base_url=f"{options.url}/v1", api_key=options.token)
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}},
                    {"type": "text", "text": options.phrase},
                ],
            }
        ],
    )
    print(answer.choices[0].message.content)
    # What OpenAI's form has no place for: boxes in pixels, kept patches, times.
    grounding = answer.model_extra["grounding"]
    print(grounding["boxes"], f"score {grounding['score']:.2f}")


if __name__ == "__main__":
    main()
