// The page of `splatshard view`. What is shown is in the address behind the #, so back, forward and
// links work: `shard` of the list, `text`, `status`, `low`, `high`, `order`, `start`; `at` and `row` of
// the sample. All that comes from a dataset is put in as text.

import { $, address, complain, decibels, el, get, number, several } from "/view_parts.js";
import { showSample, zoom } from "/view_sample.js";

const FIELDS = ["text", "status", "low", "high"];
const INPUTS = [...FIELDS, "name"];
const PAGE = 50;
const MOST_BARS = 60;
const ORDERS = {
  shards: { name: "name", worst: "worst sample", mean: "worst mean", skipped: "most skipped" },
  samples: { row: "row", worst: "worst first", best: "best first" },
};

// Where we are

let here = {};
let turn = 0; // of lists: what an older one finds is dropped
let list = { key: null, items: [], next: null, start: 0, total: null };

const read = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
const link = (place) => address("", place).replace("?", "#");
const query = (place) => Object.fromEntries(FIELDS.map((name) => [name, place[name] ?? ""]));
const isAsked = (place) => FIELDS.some((name) => place[name]);
const kindOf = (place) => (place.shard ? "shard" : isAsked(place) ? "scan" : "shards");
const without = (place, ...names) =>
  Object.fromEntries(Object.entries(place).filter(([name]) => !names.includes(name)));

function go(place, replace = false) {
  const target = link(place);
  if (replace) history.replaceState(null, "", target);
  else history.pushState(null, "", target);
  arrive();
}

async function arrive() {
  here = read();
  complain(null);
  const samples = kindOf(here) !== "shards";
  fill($("order"), ORDERS[samples ? "samples" : "shards"], here.order);
  $("order").disabled = kindOf(here) === "scan";
  for (const name of INPUTS) if ($(name) !== document.activeElement) $(name).value = here[name] ?? "";
  document.body.classList.toggle("reading", Boolean(here.at));
  document.body.classList.toggle("asking", isAsked(here));
  $("back").href = link(without(here, "at", "row"));
  const shown = here.at ? showSample(here.at, here.row) : showOverview();
  await Promise.all([shown, showList()]).catch(complain);
}

function fill(select, options, chosen) {
  select.replaceChildren(...Object.entries(options).map(([value, text]) => el("option", { value }, text)));
  select.value = chosen in options ? chosen : Object.keys(options)[0];
}

// The list

async function showList() {
  const kind = kindOf(here);
  const key = JSON.stringify([kind, here.shard, here.name, query(here), here.order, kind === "scan" ? "" : here.start]);
  const isThere = kind !== "shard" || !here.at || here.start !== undefined || list.items.some(isHere);
  if (key === list.key && isThere) return mark();
  const mine = ++turn;
  list = { key, items: [], next: kind === "scan" ? ["", 0] : null, start: 0, total: null };
  $("stop").hidden = true;
  $("scope").querySelector("span").replaceChildren(...scopeOf(kind));
  $("name").hidden = kind !== "shards";
  $("list").replaceChildren();
  $("told").textContent = "…";
  if (kind === "scan") return scanOn(PAGE);
  const asked = { order: here.order, start: here.start };
  const around = here.at && here.start === undefined ? here.row : undefined;
  const found =
    kind === "shard"
      ? await get("/api/samples", { shard: here.shard, ...query(here), ...asked, around })
      : await get("/api/shards", { ...asked, text: here.name });
  if (mine !== turn) return;
  Object.assign(list, found);
  $("list").append(...found.items.map(kind === "shard" ? sampleEntry : shardEntry));
  const last = found.start + found.items.length;
  const noun = kind === "shard" ? "sample" : "shard";
  $("told").textContent = found.total ? `${number(found.start + 1)}–${number(last)} of ${several(found.total, noun)}` : "none";
  $("less").disabled = found.start === 0;
  $("more").disabled = last >= found.total;
  mark();
}

async function scanOn(wanted) {
  const mine = ++turn;
  $("less").disabled = $("more").disabled = true;
  $("stop").hidden = false;
  const damaged = [];
  let told = "";
  try {
    while (list.next && list.items.length < wanted) {
      const [shard, row] = list.next;
      const found = await get("/api/scan", { ...query(here), shard, row });
      if (mine !== turn) return;
      list.items.push(...found.items);
      $("list").append(...found.items.map(sampleEntry));
      list.next = found.next;
      damaged.push(...found.damaged);
      told = `${number(list.items.length)} found in ${number(found.done)} of ${several(found.shards, "shard")}`;
      $("told").textContent = `${told} …`;
      if (damaged.length) complain(new Error(damaged.join("\n")));
      mark();
    }
  } finally {
    if (mine === turn) ended(list.next ? `${told}, and more` : told);
  }
}

function ended(told) {
  $("told").textContent = told;
  $("stop").hidden = true;
  $("more").disabled = !list.next;
}

function stop() {
  if ($("stop").hidden) return false;
  turn++;
  ended(`stopped: ${$("told").textContent.replace(" …", "")}`);
  return true;
}

function scopeOf(kind) {
  if (kind === "shards") return ["all shards"];
  const all = el("a", { href: link(without(here, "shard", "at", "row", "start", "order", "name")) }, "all shards");
  return kind === "scan" ? ["in all shards ", el("a", { href: "#" }, "clear")] : [all, ` › ${here.shard}`];
}

function shardEntry(shard) {
  const facts =
    shard.state === "done"
      ? `${several(shard.samples, "sample")}${shard.skipped ? `, ${number(shard.skipped)} skipped` : ""}, worst ${decibels(shard.psnr_min)}`
      : `${shard.state}${shard.why ? `: ${shard.why}` : ""}`;
  const inside = [el("b", {}, shard.name), el("span", { class: shard.state === "done" ? "" : "bad" }, facts)];
  const side = el("i", {}, shard.state === "done" ? decibels(shard.psnr_mean) : "");
  const text = el("div", {}, ...inside);
  return el("li", {}, shard.state === "done" ? el("a", { href: link({ shard: shard.name }) }, text, side) : text);
}

function sampleEntry(item) {
  const ok = item.status === "ok";
  const src = address("/image/rendering", { shard: item.shard, row: item.row, side: 96 });
  const picture = ok ? el("img", { src, alt: "", loading: "lazy" }) : el("div", { class: "none" }, "–");
  const words = el("div", {}, el("b", { dir: "auto" }, item.key), el("span", { dir: "auto", class: ok ? "" : "bad" }, ok ? item.caption : item.status));
  const href = link({ ...without(here, "start"), at: item.shard, row: item.row });
  const entry = el("a", { href, "data-at": item.shard, "data-row": item.row }, picture, words, el("i", {}, ok ? decibels(item.psnr) : ""));
  entry.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    open(item, Boolean(here.at));
  });
  return el("li", {}, entry);
}

const isHere = (item) => item.shard === here.at && String(item.row) === here.row;

function mark() {
  for (const entry of $("list").querySelectorAll("a[data-at]")) {
    const chosen = entry.dataset.at === here.at && entry.dataset.row === here.row;
    if (chosen) entry.setAttribute("aria-current", "true");
    else entry.removeAttribute("aria-current");
    if (chosen) entry.scrollIntoView({ block: "nearest" });
  }
  const place = list.items.findIndex(isHere);
  $("previous").disabled = place <= 0 && !(place === 0 && list.start > 0);
  $("next").disabled = place < 0 || (place === list.items.length - 1 && $("more").disabled);
}

const open = (item, replace) => go({ ...here, at: item.shard, row: String(item.row) }, replace);

async function step(by) {
  const place = list.items.findIndex(isHere);
  if (place < 0) return;
  if (!list.items[place + by]) await turnPage(by);
  const item = list.items[list.items.findIndex(isHere) + by] ?? (kindOf(here) === "shard" && list.items.at(by > 0 ? 0 : -1));
  if (item && !isHere(item)) open(item, true);
}

async function turnPage(by) {
  if ((by > 0 ? $("more") : $("less")).disabled) return;
  if (kindOf(here) === "scan") return scanOn(list.items.length + PAGE);
  const start = String(Math.max(0, list.start + by * PAGE));
  history.replaceState(null, "", link({ ...here, start }));
  here = read();
  await showList();
}

// What there is: of all shards, or of one

async function showOverview() {
  const mine = here;
  const found = here.shard ? await get("/api/shard", { shard: here.shard }) : await get("/api/overview");
  if (mine !== here) return;
  $("sample").hidden = true;
  $("overview").hidden = false;
  const name = here.shard ?? found.dst.split("/").at(-1);
  document.title = `${name} – splatshard view`;
  const skipped = Object.entries(found.skipped);
  const total = skipped.reduce((sum, [, n]) => sum + n, 0);
  const tiles = [["samples", number(found.samples)], ["skipped", number(total)]];
  if (found.ok) {
    tiles.push(["mean PSNR", decibels(found.psnr_mean)], ["Gaussians per image", number(found.num_gaussians_mean)]);
    tiles.push(["bytes per image", number(found.bytes_per_image)]);
  }
  if (found.shards) tiles.unshift(["shards", number(found.shards.done)]);
  else tiles.push(["codec", found.codec + (found.budgets.length ? `, nested ${found.budgets.join(", ")}` : "")]);
  const broken = Object.entries(found.shards ?? {}).filter(([kind, n]) => kind !== "done" && n);
  const asked = here;
  const only = (query) => link({ ...without(asked, "start", "order"), ...query });
  $("overview").replaceChildren(
    el("h1", {}, name),
    el("p", { class: "path" }, here.shard ? `${found.file}, from ${found.source}` : found.dst),
    ...(broken.length ? [el("p", { class: "warning" }, `Not complete: shards ${broken.map(([kind, n]) => `${number(n)} ${kind}`).join(", ")}.`)] : []),
    el("dl", { class: "tiles" }, ...tiles.map(([what, value]) => el("div", {}, el("dt", {}, what), el("dd", {}, value)))),
    ...histogram(found.histogram, only),
    ...(skipped.length ? [el("h2", {}, "Skipped samples"), el("ul", { class: "reasons" }, ...skipped.map(([status, n]) => el("li", {}, el("a", { href: only({ status }) }, status), ` ${number(n)}`)))] : []),
  );
}

function histogram(found, only) {
  if (!found) return [];
  const wide = Math.ceil(found.counts.length / MOST_BARS);
  const bars = [];
  for (let i = 0; i < found.counts.length; i += wide) {
    const images = found.counts.slice(i, i + wide).reduce((a, b) => a + b, 0);
    bars.push({ images, low: found.begin + i * found.step, high: found.begin + (i + wide) * found.step });
  }
  const top = Math.max(...bars.map((bar) => bar.images));
  const drawn = bars.map(({ images, low, high }) => {
    const title = `${several(images, "image")} from ${low} to ${high} dB`;
    const bar = images ? el("a", { href: only({ low, high }), title, "aria-label": title }) : el("span");
    bar.style.height = `${images ? Math.max(2, (100 * images) / top) : 0}%`;
    return bar;
  });
  const [first, last] = [bars[0].low, bars.at(-1).high];
  return [
    el("h2", {}, "PSNR"),
    el("div", { class: "histogram" }, ...drawn),
    el("div", { class: "axis" }, el("span", {}, `${first} dB`), el("span", {}, "choose a bar to see its samples"), el("span", {}, `${last} dB`)),
  ];
}

// From the page's controls to the address

function typed() {
  const fields = Object.fromEntries(INPUTS.map((name) => [name, $(name).value.trim()]));
  go({ ...without(here, "at", "row", "start"), ...fields }, true);
}

let waiting;
function soon(call, ms) {
  clearTimeout(waiting);
  waiting = setTimeout(call, ms);
}

$("search").addEventListener("submit", (event) => {
  event.preventDefault();
  soon(typed, 0);
});
for (const name of ["text", "name"]) $(name).addEventListener("input", () => soon(typed, 400));
for (const name of ["status", "low", "high"]) $(name).addEventListener("change", () => soon(typed, 0));
$("order").addEventListener("change", () => go({ ...without(here, "start"), order: $("order").value }, true));
$("more").addEventListener("click", () => turnPage(1).catch(complain));
$("less").addEventListener("click", () => turnPage(-1).catch(complain));
$("stop").addEventListener("click", stop);
$("previous").addEventListener("click", () => step(-1).catch(complain));
$("next").addEventListener("click", () => step(1).catch(complain));
$("again").addEventListener("click", () => start("again").catch(complain));
addEventListener("popstate", arrive);

addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, select, textarea");
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") {
    if (typing) event.target.blur();
    else if (!stop() && here.at) go(without(here, "at", "row"));
    return;
  }
  const done = { ArrowLeft: () => step(-1), ArrowRight: () => step(1), "/": () => $("text").focus() };
  const zooms = { "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), 0: () => zoom(0) };
  const call = { ...done, ...zooms }[event.key];
  if (typing || !call) return;
  event.preventDefault();
  Promise.resolve(call()).catch(complain);
});

async function start(again = "") {
  const found = await get("/api/overview", { again });
  const kinds = Object.keys(found.skipped);
  const options = { "": "any", ok: "ok", ...(kinds.length ? { skipped: "skipped" } : {}) };
  fill($("status"), { ...options, ...Object.fromEntries(kinds.map((kind) => [kind, kind])) }, here.status);
  list.key = null;
  await arrive();
}

start().catch(complain);
