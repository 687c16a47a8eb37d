// What both halves of the page use.

export const $ = (id) => document.getElementById(id);

export const number = (value, digits = 0) =>
  value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
export const several = (n, noun) => `${number(n)} ${noun}${n === 1 ? "" : "s"}`;
export const decibels = (value) => (value === null || value === undefined ? "–" : `${number(value, 2)} dB`);

export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== null && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export function address(path, parameters) {
  const kept = Object.entries(parameters).filter(([, v]) => v !== "" && v !== null && v !== undefined);
  return `${path}?${new URLSearchParams(kept)}`;
}

export async function get(path, parameters = {}) {
  let answer;
  try {
    answer = await fetch(address(path, parameters));
  } catch {
    throw new Error("splatshard view does not answer any more: start it again");
  }
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error);
  return found;
}

export function complain(error) {
  $("error").textContent = error ? error.message : "";
  $("error").hidden = !error;
}
