"""What the tour says: why each stage is there, and what the figures of a verdict mean."""

from bitferry.pipeline.verdict import Verdict

BEGIN = """
# From a PyTorch model to a proved 8-bit bundle

Eight stages on embedded Fashion-MNIST images, for the target `{target}`. Everything is written to `{folder}`, and a
tour that was stopped goes on from there when it is started again. The recipe is `{recipe}`: read it, it is short.
"""

DATA = """
Three sets of images: to **train** on, to **calibrate** int8 with, and to **evaluate** on. They are decoded by the very
code that will run on the device, and compared by content: an image in two of them is refused, since a model judged on
what it has seen proves nothing.
"""

TRAIN = """
The recipe names a model and no weights, so it is trained here. With `weights = "mine.pth"` in the recipe this stage is
skipped.
"""

QUANTIZE = """
Weights and activations become 8-bit integers. The calibration images go through the float model to see how far each
activation reaches; a scale is chosen for every tensor; channels are equalized and biases corrected where it helps, and
each step is taken back where the scores get worse. The result is still a PyTorch program.
"""

TRACE = """
The program as TorchScript, which PyTorch runs anywhere. Its answers are compared with the program's at once, as after
every stage: what goes wrong is found where it goes wrong.
"""

EXPORT = """
The program as ONNX, simplified, and compared again. The mean and the standard deviation are inside: the graph takes
plain pixels, so no device can forget them.
"""

COMPILE = """
ONNX becomes the target's own file, for its own kernels.
"""

VERIFY = """
The file that will be shipped and the float model answer the same images, and are timed in turns in one process.
`--quick` times for a second and a half only; without it the figures are steadier.
"""

BUNDLE = """
The artifact passed, so it is packed: the file, its ONNX, where it comes from, image files with the answers they must
give, and `run.pyz`, which holds the modules that verification ran. A device needs the target's runtime, NumPy and
Pillow; no PyTorch and no bitferry.
"""

ANSWER = """
One image, asked the way a device would ask, in a new process:

    {command}

It says `{answer}`, and the image is of an {truth}.
"""

NEXT = """
# Next

That took {seconds:.0f} seconds of stages. Run it again, and only verification is repeated: the rest is kept by content.
Open the report named above: it has the layers that lost most, and the images whose answers changed.

With a model of your own, begin with its weights and labelled images:

    bitferry init weights.pth photos --output mine.toml
    bitferry deploy mine.toml --target openvino,onnxruntime

`bitferry doctor` says which targets this machine is ready for.
"""


def figures(verdict: Verdict) -> str:
    """Say what a verdict's figures mean, with their values."""
    judged, flips, speed = verdict.accuracy.judged, verdict.accuracy.flips, verdict.latency.speedup
    sure = f"{100 * judged.confidence:g} %"
    lines = [
        f"**{verdict.outcome}**: {verdict.headline}",
        f"- The float model is right for {judged.float_percent:.2f} % of {verdict.accuracy.images} images, the shipped "
        f"file for {judged.percent:.2f} %. {flips.lost} images went from right to wrong, {flips.gained} from wrong "
        "to right.",
        f"- More images would give another figure; the true loss is below **{judged.drop_upper_pp:.2f} points** at "
        f"{sure} confidence. The budget is {verdict.budget_drop_pp:g}: that bound has to be inside it, not the figure.",
        f"- A call takes {speed.value:.2f} times less than in PyTorch ({speed.lower:.2f} to {speed.upper:.2f}), at the "
        "same number of threads.",
        f"- What really ran: {verdict.execution.summary}",
    ]
    return "\n\n".join(lines[:1]) + "\n\n" + "\n".join(lines[1:])
