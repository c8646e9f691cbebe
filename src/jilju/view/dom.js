// DOM: elements from plain calls. Text goes in as text nodes only, so nothing that a model or a server says becomes HTML.

const SVG = "http://www.w3.org/2000/svg";

function build(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

/** h("button", {type: "button", onclick: stop}, "Stop") */
export function h(tag, attributes = {}, ...children) {
  return build(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return build(document.createElementNS(SVG, tag), attributes, children);
}

/** A drawing of 20 by 20 in the text's colour, beside words or a label that say what it means. */
export function icon(...paths) {
  return svg("svg", { class: "icon", viewBox: "0 0 20 20", "aria-hidden": "true" }, ...paths.map((d) => svg("path", { d })));
}

export const byId = (id) => document.getElementById(id);
