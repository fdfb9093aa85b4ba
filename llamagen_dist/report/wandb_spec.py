"""A report as a W&B Report (the extra ``wandb-report``): its spec, and how it is sent."""

import io
import os
import tempfile
from typing import TYPE_CHECKING, Any

from PIL import Image

from llamagen_dist.errors import UserError
from llamagen_dist.report.blocks import Block, Columns, Details, Figure, Report, Section
from llamagen_dist.report.collect import Found
from llamagen_dist.report.files import encoded, markdown, named, pictures

if TYPE_CHECKING:
    import wandb_workspaces.reports.v2 as wr

_LONGEST_TITLE = 128
_KEY = "report/"  # of a plot's or picture's name in its W&B run
_CURVES = ("loss", "val_loss")


def run_ids(found: Found) -> list[str]:
    """The W&B runs that the folder's runs were logged to, as their directories say."""
    files = [run.folder / "wandb_id" for run in found.runs]
    return [file.read_text(encoding="utf-8").strip() for file in files if file.exists()]


def spec(report: Report, entity: str, project: str, runs: list[str], media: str) -> "wr.Report":
    """The whole report; nothing is sent.

    runs: W&B ids of runs whose curves W&B draws itself, live.
    media: the id of the run that has the plots and pictures, as ``publish`` logs them.
    """
    reports = _library()
    from wandb_workspaces import expr

    names = named(report)

    def panels(ids: list[str], shown: list[Any]) -> Any:
        runset = reports.Runset(filters=[expr.Metric("ID").isin(ids)])  # of the report's own project: asks no server
        return reports.PanelGrid(runsets=[runset], panels=shown, hide_run_sets=True)

    def made(block: Block) -> list[Any]:
        below = [one for inner in getattr(block, "blocks", ()) for one in made(inner)]
        if isinstance(block, Section | Details):
            lead = [reports.MarkdownBlock(block.lead)] if isinstance(block, Section) and block.lead else []
            return [(reports.H1 if isinstance(block, Section) else reports.H2)(text=block.title), *lead, *below]
        if isinstance(block, Columns):
            return below
        texts = [reports.MarkdownBlock(text) for text in markdown(block, lambda picture: "") if text]
        if id(block) not in names:
            return texts
        key, layout = _KEY + names[id(block)], reports.Layout(w=24, h=12)
        return [panels([media], [reports.MediaBrowser(media_keys=[key], num_columns=1, layout=layout)]), *texts]

    live = [reports.LinePlot(title=key, x="images_seen", y=[key], log_x=True) for key in _CURVES]
    blocks = [reports.TableOfContents(), *([panels(runs, live)] if runs else [])]
    blocks += [one for block in report.blocks for one in made(block)]
    title = report.title[:_LONGEST_TITLE]
    return reports.Report(entity=entity, project=project, title=title, description=report.subtitle, blocks=blocks)


def publish(report: Report, found: Found) -> str:
    """Log the plots and pictures to a run of their own, save the report, return its address. Raises UserError."""
    _library()
    import wandb

    if not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        raise UserError("--wandb: this machine has no W&B key; run wandb login, or set WANDB_API_KEY")
    project = os.environ.get("WANDB_PROJECT", "llamagen-dist")
    try:
        entity = os.environ.get("WANDB_ENTITY") or str(wandb.Api().default_entity)
        about: dict[str, Any] = {"entity": entity, "project": project, "job_type": "report", "name": report.title}
        with tempfile.TemporaryDirectory() as scratch, wandb.init(**about, dir=scratch) as run:
            for block in pictures(report):
                words = block.alt if isinstance(block, Figure) else ", ".join(block.captions)
                picture = Image.open(io.BytesIO(encoded(block)[".png"]))
                run.log({_KEY + named(report)[id(block)]: wandb.Image(picture, caption=words)}, step=0)
        made = spec(report, entity, project, run_ids(found), run.id)
        made.save()
    except Exception as error:  # the library raises bare ones for a lost network and for missing rights alike
        raise UserError(f"--wandb: the report could not be sent to W&B ({error}); the page is written") from None
    return str(made.url)


def _library() -> Any:
    try:
        import wandb_workspaces.reports.v2 as reports
    except ImportError:
        raise UserError("--wandb needs wandb-workspaces: pip install 'llamagen-dist[wandb-report]'") from None
    return reports
