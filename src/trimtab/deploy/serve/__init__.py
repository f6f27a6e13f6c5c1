"""Serving a model over HTTP: `serve(path)`, or ``trimtab serve PATH``; needs the extra ``trimtab[serve]``.

`server` opens the model and listens, `app` answers, `uploads` takes pictures from strangers, `batching` runs those that
arrive together as one batch, and `service` is what services of other things than pictures have, too.
"""

from __future__ import annotations

from trimtab.core.errors import need

for _module in ("fastapi", "uvicorn", "python_multipart", "prometheus_client"):
    need(_module, "serve")

from trimtab.deploy.serve.app import create_app  # noqa: E402
from trimtab.deploy.serve.batching import Batcher, Busy  # noqa: E402
from trimtab.deploy.serve.server import serve  # noqa: E402
from trimtab.deploy.serve.uploads import Limits, Refused  # noqa: E402

__all__ = ["Batcher", "Busy", "Limits", "Refused", "create_app", "serve"]
