// A page's beginning: language, words, API, key and top bar, the same for each of them.
//
// Owns the order in which they come about. What stands in the HTML with data-text and its like is filled here.

import { createApi } from "./api.js";
import { byId } from "./dom.js";
import { chooseLanguage, createWords } from "./i18n.js";
import { createKeyView, readKey } from "./key_view.js";
import { STRINGS as en } from "./strings.en.js";
import { STRINGS as ko } from "./strings.ko.js";
import { createTopBar } from "./top_bar.js";

/**
 * `strings`: the page's own tables, {en, ko}. `bar(words)`: what the page adds to the top bar, see createTopBar; the header is
 * the element "bar". Returns {words, api, key}; `key.ask()` opens the key dialog.
 */
export function openPage({ page, strings, bar = () => ({}) }) {
  const words = createWords(chooseLanguage(navigator.languages), [{ en, ko }, strings]);
  document.documentElement.lang = words.language;
  words.fill(document);
  createTopBar({ root: byId("bar"), words, page, ...bar(words) });

  const bare = createApi({ key: readKey, wantKey: async () => false });
  const key = createKeyView({ words, accepted: () => isTaken(bare) });
  // The password that a browser asked for by itself holds for the folder of the page. The root, asked for once, makes it hold
  // for all.
  let isEntered = location.pathname.lastIndexOf("/") === 0;
  async function wantKey() {
    if (isEntered) return key.ask();
    isEntered = true;
    await bare.call("/", { method: "HEAD" }).catch(() => null); // what is wrong, the call that is made again will say
    return true;
  }
  return { words, key, api: createApi({ key: readKey, wantKey }) };
}

// Any key is good enough for this route. What else may go wrong is for the call that comes next to say.
async function isTaken(api) {
  try {
    await api.call("/v1/models");
    return true;
  } catch (error) {
    return error.code !== "invalid_api_key";
  }
}
