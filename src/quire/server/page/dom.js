// Elements without HTML: every text of a user or a model becomes a text node, never markup.

/** Make an element. Properties beginning with "on" are listeners; null and false are left out; a class is `class`. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Make an SVG element. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Have a screen reader say a sentence. */
export function say(text) {
  document.getElementById("said").textContent = text;
}

/** Show a sentence above the view until it is replaced; an empty one hides it. */
export function showBanner(text) {
  const banner = document.getElementById("banner");
  banner.hidden = !text;
  if (banner.textContent !== text) banner.textContent = text;
}

/** A text with its ``` blocks set as code. Everything stays text. */
export function prose(text) {
  return text.split(/^```/m).map((part, index) => {
    if (index % 2 === 0) return h("span", {}, part);
    const end = part.indexOf("\n");
    return h("pre", {}, h("code", {}, end < 0 ? part : part.slice(end + 1)));
  });
}

/** A number with few digits: 1234 → "1,234", 0.1234 → "0.12". */
export function short(number) {
  if (!Number.isFinite(number)) return "–";
  return number.toLocaleString("en", { maximumFractionDigits: Math.abs(number) < 10 ? 2 : 0 });
}
