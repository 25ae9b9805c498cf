"""What a client of S3 costs that can write on condition: installed size, time to import and to the first object, and
whether it finds the keys of a profile. The figures of decision 44.

    python -m benchmarks.s3_clients

Each client is measured in new processes, if it is installed. One way to have all: `pip install --target FOLDER obstore
s3fs`, and FOLDER in PYTHONPATH.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from pipeline.text_table import text_table
from tests.s3 import S3Server, serve

CONNECT = {
    "botocore": """
from botocore.session import Session
from botocore.exceptions import ClientError as Refused
client = Session().create_client("s3")
def put(): client.put_object(Bucket="bucket", Key=key, Body=b"x", IfNoneMatch="*")
""",
    "boto3": """
import boto3
from botocore.exceptions import ClientError as Refused
client = boto3.client("s3")
def put(): client.put_object(Bucket="bucket", Key=key, Body=b"x", IfNoneMatch="*")
""",
    "obstore": """
import obstore, os
from obstore.exceptions import AlreadyExistsError as Refused
from obstore.store import S3Store
store = S3Store("bucket", client_options={"allow_http": True}, retry_config={"max_retries": 0})
def put(): obstore.put(store, key, b"x", mode="create")
""",
    "s3fs": """
import s3fs
Refused = FileExistsError
fs = s3fs.S3FileSystem()
def put(): fs.pipe_file("bucket/" + key, b"x", mode="create")
""",
}
"""Code that defines `put`, which creates an object, and `Refused`, the error if it exists."""

MEASURE = """
import json, sys, time
began = time.monotonic()
key = sys.argv[1]
{connect}
imported = time.monotonic()
put()
first = time.monotonic()
try:
    put()
    refused = False
except Refused:
    refused = True
print(json.dumps({{"import": imported - began, "put": first - imported, "refused": refused}}))
"""

REQUIREMENTS = {"botocore": ["botocore", "jmespath"], "boto3": ["boto3", "s3transfer", "botocore", "jmespath"]} | {
    "obstore": ["obstore"],
    "s3fs": ["s3fs", "aiobotocore", "aioitertools", "botocore", "jmespath", "wrapt"],
}
"""Packages that `requirements.txt` would gain."""


def megabytes(package: str) -> float:
    files = importlib.metadata.files(package) or []
    return sum(path.stat().st_size for file in files if (path := Path(str(file.locate()))).is_file()) / 1e6


def run(client: str, key: str, env: dict[str, str]) -> dict[str, float] | str:
    """Figures of one process, or the last line of its error."""
    code = MEASURE.format(connect=CONNECT[client])
    done = subprocess.run([sys.executable, "-c", code, key], env=os.environ | env, capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr.strip().splitlines()[-1][:100]


def with_profile(server: S3Server, folder: Path) -> dict[str, str]:
    """An environment in which only a profile has the keys and the region."""
    (folder / "config").write_text("[profile mine]\nregion = us-east-1\n")
    (folder / "credentials").write_text("[mine]\naws_access_key_id = key\naws_secret_access_key = secret\n")
    files = {"AWS_CONFIG_FILE": str(folder / "config"), "AWS_SHARED_CREDENTIALS_FILE": str(folder / "credentials")}
    return files | {"AWS_PROFILE": "mine", "AWS_EC2_METADATA_DISABLED": "true", "AWS_ENDPOINT_URL": server.endpoint}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    rows = []
    with serve() as server, tempfile.TemporaryDirectory() as folder:
        for client in CONNECT:
            if importlib.util.find_spec(client) is None:
                print(f"{client} is not installed")
                continue
            runs = [run(client, f"{client}-{i}", server.env | {"AWS_ALLOW_HTTP": "true"}) for i in range(repeats + 1)]
            good = [figures for figures in runs[1:] if not isinstance(figures, str)]  # the first one compiles
            by_profile = run(client, f"{client}-profile", with_profile(server, Path(folder)))
            if not good:
                print(client, runs[-1])
                continue
            rows.append(
                [
                    f"{client} {importlib.metadata.version(client)}",
                    ", ".join(REQUIREMENTS[client]),
                    f"{sum(map(megabytes, REQUIREMENTS[client])):.0f}",
                    *(f"{median(figures[what] for figures in good) * 1000:.0f}" for what in ("import", "put")),
                    "yes" if all(figures["refused"] for figures in good) else "no",
                    "no" if isinstance(by_profile, str) else "yes",
                ]
            )
    heads = ["client", "packages more", "MB", "import, client (ms)", "first put (ms)", "second put refused", "profile"]
    print(text_table(heads, rows, "llrrrll"))


if __name__ == "__main__":
    main()
