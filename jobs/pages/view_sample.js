// One sample: its four pictures, which zoom and move together, the budget they are drawn with, its
// facts. What arrives late, of a sample that is no longer shown, is dropped.

import { $, address, complain, decibels, el, get, number, several } from "/view_parts.js";

const LARGEST_ZOOM = 32;
const MOVES_ALONE = 3; // px of a press that is no drag
const DIM = "rgb(10 11 14 / 72%)";

let sample = null;
let shown = 0; // samples so far
let drawn = 0; // budgets so far
let view = { zoom: 1, x: 0.5, y: 0.5 }; // the middle, in parts of the picture
let rings = null; // of /api/ellipses

const place = () => ({ shard: sample.shard, row: sample.row });

export async function showSample(shard, row) {
  const mine = ++shown;
  const found = await get("/api/sample", { shard, row });
  if (mine !== shown) return;
  sample = found;
  view = { zoom: 1, x: 0.5, y: 0.5 };
  $("overview").hidden = true;
  $("sample").hidden = false;
  document.title = `${sample.key} – splatshard view`;
  const own = el("a", { href: address("", { ...place(), at: sample.shard }).replace("?", "#") }, sample.shard);
  $("place").replaceChildren("shard ", own, `, row ${number(sample.row)} of 0–${number(sample.rows - 1)}`);
  $("key").textContent = sample.key;
  $("caption").textContent = sample.caption ?? "";
  const ok = sample.status === "ok";
  $("looks").hidden = !ok;
  $("skipped").hidden = ok;
  $("skipped").textContent = ok ? "" : `Skipped as ${sample.status}: ${sample.error ?? "no reason is told"}`;
  $("facts").replaceChildren(...facts().flatMap(([what, value]) => [el("dt", {}, what), el("dd", {}, value)]));
  $("metadata").hidden = !sample.metadata;
  $("metadata").querySelector("pre").textContent = pretty(sample.metadata);
  if (ok) await showPictures(mine);
}

function facts() {
  const { width, height, original_width, original_height, budgets, label } = sample;
  const found = [["shard", sample.shard], ["row", number(sample.row)], ["status", sample.status]];
  if (sample.status === "ok") {
    found.push(["PSNR", decibels(sample.psnr)], ["lost by the codec", decibels(sample.psnr_loss)]);
    found.push(["Gaussians", number(sample.num_gaussians)], ["bytes", stored(budgets.at(-1))]);
    found.push(["codec", sample.codec], ["steps", sample.steps === null ? "–" : number(sample.steps)]);
    found.push(["size", `${width} × ${height} px`], ["original size", `${original_width} × ${original_height} px`]);
  }
  if (label !== null) found.push(["label", sample.class ? `${label}, ${sample.class}` : String(label)]);
  if (sample.uid) found.push(["uid", sample.uid]);
  const members = sample.members.map(({ name, bytes }) => `${name} (${number(bytes)} B)`);
  if (members.length) found.push(["other members", members.join(", ")]);
  found.push(["source", sample.source]);
  return found;
}

const stored = ({ stored, bytes }) =>
  number(stored) + (bytes === stored ? "" : `, compressed (${number(bytes)} before)`);

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

// Pictures

async function showPictures(mine) {
  for (const box of document.querySelectorAll("#sample .box")) {
    const ratio = sample.width / sample.height;
    box.style.aspectRatio = ratio;
    box.style.maxWidth = `${80 * ratio}vh`; // none is higher than the window
  }
  const last = sample.budgets.length - 1;
  $("budgets").hidden = last === 0;
  $("budget").max = last;
  $("budget").value = last;
  rings = null;
  for (const name of ["original", "rendering", "residual"]) say(name, "…");
  sample.original = get("/api/original", place()).then(({ reason }) => reason);
  const original = sample.original.then((reason) => {
    if (mine !== shown) return;
    return reason ? say("original", `No original: ${reason}`) : put("original", address("/image/original", place()), () => mine === shown);
  });
  await Promise.all([original, showBudget()]);
}

async function showBudget() {
  const [mine, now] = [shown, ++drawn];
  const isCurrent = () => mine === shown && now === drawn;
  const nested = sample.budgets.length > 1;
  const { budget, gaussians, psnr, stored } = sample.budgets[Number($("budget").value)];
  const of = gaussians < sample.num_gaussians ? ` of ${number(sample.num_gaussians)}` : "";
  $("figures").textContent = `${number(gaussians)}${of} Gaussians · ${decibels(psnr)} · ${number(stored)} B`;
  $("budget").setAttribute("aria-valuetext", several(gaussians, "Gaussian"));
  const asked = { ...place(), budget: nested ? budget : undefined };
  const rendering = put("rendering", address("/image/rendering", asked), isCurrent);
  const ellipses = get("/api/ellipses", asked).then((found) => {
    if (!isCurrent()) return;
    rings = found;
    const { length } = found.ellipses;
    const all = length === found.gaussians ? "" : `, the strongest ${number(length)}`;
    $("ellipses").querySelector("figcaption").textContent = `ellipses, 1σ${all}`;
    move();
  });
  await Promise.all([rendering, ellipses, showResidual(asked, isCurrent)]);
  if (isCurrent()) $("sample").dataset.shown = `${sample.shard}/${sample.row}/${budget}/${$("gain").value}`;
}

async function showResidual(asked, isCurrent) {
  const reason = await sample.original;
  if (!isCurrent()) return;
  if (reason) return say("residual", "No residual without the original.");
  return put("residual", address("/image/residual", { ...asked, gain: $("gain").value }), isCurrent);
}

function say(name, text) {
  $(name).querySelector(".box").replaceChildren(el("p", { class: "gone" }, text));
}

async function put(name, src, isCurrent) {
  const picture = el("img", { src, alt: `${name} of ${sample.key}`, draggable: "false" });
  try {
    await picture.decode();
  } catch {
    const found = await fetch(src).then((answer) => (answer.ok ? { error: "this picture cannot be shown" } : answer.json()));
    if (isCurrent()) say(name, found.error);
    return;
  }
  if (!isCurrent()) return;
  $(name).querySelector(".box").replaceChildren(picture);
  move();
}

// Zoom

export function zoom(by, x = view.x, y = view.y) {
  const zoomed = by === 0 ? 1 : Math.min(LARGEST_ZOOM, Math.max(1, view.zoom * by));
  const share = view.zoom / zoomed; // (x, y) stays where it is
  view = { zoom: zoomed, x: x + (view.x - x) * share, y: y + (view.y - y) * share };
  move();
}

function move() {
  const half = 0.5 / view.zoom;
  view.x = Math.min(1 - half, Math.max(half, view.x));
  view.y = Math.min(1 - half, Math.max(half, view.y));
  const [left, top] = [(0.5 - view.x * view.zoom) * 100, (0.5 - view.y * view.zoom) * 100];
  for (const picture of document.querySelectorAll("#sample .box img")) {
    picture.style.transform = `translate(${left}%, ${top}%) scale(${view.zoom})`;
    const scale = (picture.clientWidth * view.zoom * devicePixelRatio) / picture.naturalWidth;
    picture.style.imageRendering = scale > 3 ? "pixelated" : "auto";
  }
  $("fit").textContent = `${number(view.zoom, view.zoom < 10 && view.zoom % 1 ? 1 : 0)}×`;
  requestAnimationFrame(draw);
}

function draw() {
  const canvas = $("ellipses").querySelector("canvas");
  const [width, height] = [canvas.clientWidth, canvas.clientHeight].map((px) => Math.round(px * devicePixelRatio));
  if (!width || !rings) return;
  Object.assign(canvas, { width, height });
  const pen = canvas.getContext("2d");
  const scale = (view.zoom * width) / rings.width;
  const [left, top] = [width * (0.5 - view.x * view.zoom), height * (0.5 - view.y * view.zoom)];
  const rendering = $("rendering").querySelector("img");
  if (rendering) pen.drawImage(rendering, left, top, view.zoom * width, view.zoom * height);
  pen.fillStyle = DIM;
  pen.fillRect(0, 0, width, height);
  pen.lineWidth = Math.max(1, devicePixelRatio);
  for (const [x, y, major, minor, angle, color, darkens] of rings.ellipses.toReversed()) {
    const [px, py, reach] = [left + x * scale, top + y * scale, major * scale];
    if (px + reach < 0 || py + reach < 0 || px - reach > width || py - reach > height) continue;
    pen.setLineDash(darkens ? [3, 3] : []);
    pen.strokeStyle = color;
    pen.beginPath();
    pen.ellipse(px, py, reach, minor * scale, angle, 0, 2 * Math.PI);
    pen.stroke();
  }
}

const inPicture = (event, box) => {
  const { left, top, width, height } = box.getBoundingClientRect();
  const parts = [(event.clientX - left) / width - 0.5, (event.clientY - top) / height - 0.5];
  return [view.x + parts[0] / view.zoom, view.y + parts[1] / view.zoom];
};

for (const box of document.querySelectorAll("#sample .box")) {
  let from = null;
  box.addEventListener("pointerdown", (event) => {
    if (view.zoom > 1 && event.button === 0) from = inPicture(event, box);
  });
  box.addEventListener("pointermove", (event) => {
    if (!from) return;
    const [x, y] = inPicture(event, box);
    if (!box.hasPointerCapture(event.pointerId)) {
      if (Math.hypot(x - from[0], y - from[1]) * box.clientWidth * view.zoom < MOVES_ALONE) return;
      box.setPointerCapture(event.pointerId);
    }
    view = { ...view, x: view.x + from[0] - x, y: view.y + from[1] - y };
    move();
  });
  for (const end of ["pointerup", "pointercancel"]) box.addEventListener(end, () => (from = null));
  box.addEventListener("dblclick", (event) => zoom(view.zoom < 8 ? 2 : 0, ...inPicture(event, box)));
  box.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    zoom(event.deltaY < 0 ? 1.25 : 0.8, ...inPicture(event, box));
  }, { passive: false });
}

$("budget").addEventListener("input", () => showBudget().catch(complain));
$("gain").addEventListener("change", () => showBudget().catch(complain));
$("out").addEventListener("click", () => zoom(1 / 1.5));
$("fit").addEventListener("click", () => zoom(0));
$("in").addEventListener("click", () => zoom(1.5));
addEventListener("resize", move);
